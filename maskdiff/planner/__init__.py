"""Memory, time and communication of a config on TPUs, without a TPU.

Profiles compare the estimates with the measured times of a run.

- plan: plans a training run.
- plan_sample: plans sampling.
- plan_rl: plans policy optimization. target_rl compiles its programs, copies_rl
  counts its masked tokens, tables_rl formats it.
- sweep: plans many configs and ranks them.
- fields: the keys of a plan.
- tables: plans as tables for a terminal.
- plot: a plan as a bar chart.
- calibration: estimates against published measurements; a band of MFU.
- levers: config keys that lower the memory of a plan.
- pricing: compiles one program; its memory and time.
- target: compiles programs for a TPU topology.
- environment: environment variables to set before JAX is imported.
- parts: the part of the model that an instruction belongs to.
- hlo: parses the text of a compiled program.
- hlo_cost: estimates the time of a program. hlo_loops finds trip counts;
  hlo_kernels, hlo_rows and hlo_collectives price attention kernels, gathers
  and scatters, and collectives. hlo_clock simulates transfers.
- training_run: the main function of the scripts that train.
- profiling: traces steps of a training, for --profile.
- comparison: estimated and measured times of parts; tables_profile formats
  them. trace reads a trace, measured finds the steps in it, roofline estimates
  the time of a GPU program.
"""
