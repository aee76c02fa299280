"""Studies of precision, one command each: `mace-triton study precision | search | report`."""
