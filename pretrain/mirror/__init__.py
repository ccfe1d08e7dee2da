"""RUN_DIR -> W&B, in a process that training never waits for. `python -m pretrain.mirror RUN_DIR`.

    rows.py      what the run directory says, as one row a step
    account.py   what W&B's own settings and login say
    upload.py    the W&B run that the rows are sent to
    __main__.py  the command: once, or following a run that trains

metrics.jsonl is the truth and W&B is a copy of it. Offline, the copy is made anew at each start. Online, the
server says what it has, and is sent the rest.
"""
