"""THE PROOF: did tuning help? Answers in, measures and verdicts out; no torch, no files of runs, no HTTP."""
