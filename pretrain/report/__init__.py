"""RUN_DIR/report.html: what became of one run or several, in one file that needs nothing else."""
