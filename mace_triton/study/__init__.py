"""Studies of precision, one command each: `mace-triton study precision | md | training | search | report`."""
