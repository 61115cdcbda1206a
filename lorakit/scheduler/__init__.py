"""Many GPUs: which replica serves which request, and how many there are. Policy and simulator are pure Python."""
