"""The claim that LASAD is as good as softmax, measured: runs by hand, and their tables."""
