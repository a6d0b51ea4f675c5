"""What `sweep.py` is made of: what a study wants, where its runs stand, who trains them, and where."""
