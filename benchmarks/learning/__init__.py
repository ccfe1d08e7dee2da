"""open_clip's own training program beside Medley's `itc`: who has learned more after the same CPU time?"""
