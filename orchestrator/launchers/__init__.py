"""One file a launcher; `base.py` says what each of them has to do."""
