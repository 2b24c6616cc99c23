"""When a run ends: what is seen of it, rules, and the judgment of both."""
