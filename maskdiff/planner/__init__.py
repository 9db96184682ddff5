"""Memory, time and communication of a config on TPUs, without a TPU.

- plan: plans a training run.
- plan_sample: plans sampling.
- sweep: plans many configs and ranks them.
- fields: the keys of a plan.
- tables: plans as tables for a terminal.
- plot: a plan as a bar chart.
- levers: config keys that lower the memory of a plan.
- pricing: memory and time of one program.
- target: compiles programs for a TPU topology.
- environment: environment variables to set before JAX is imported.
- parts: the part of the model that an instruction belongs to.
- hlo: parses the text of a compiled program.
- hlo_cost: prices a program; hlo_loops, hlo_kernels and hlo_collectives price
  its loops, attention kernels and collectives.
"""
