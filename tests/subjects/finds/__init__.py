"""Where torch itself gives other numbers on several ranks, and says nothing: one file for each."""
