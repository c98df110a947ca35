"""How fast kvmreq is, and what it costs: every figure a ratio, or a rate, from one run on one machine."""
