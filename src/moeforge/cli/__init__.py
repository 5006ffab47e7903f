"""The command line: one short file per verb. `app` finds the verb, `output` prints what it returns."""
