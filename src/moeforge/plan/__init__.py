"""The planner: what a placement costs before anything runs. Arithmetic only, no torch."""
