"""Ways to answer /classify, one file each, behind one contract."""
