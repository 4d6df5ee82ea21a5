"""Files for hydra.searchpath=[pkg://their_kd.conf]."""
