"""Devices, processes and the compiler.

- mesh: the device mesh, and shardings of parameters and activations.
- runtime: joins the processes of a run; compilation cache.
- consensus: preemption; checks that all processes have one config and code.
- shares: divides work among processes that each have a copy of a model.
- watchdog: reports a stalled run, with the stacks of all threads.
- chips: peak FLOP/s, memory and link bandwidths of TPU chips.
- compiler: XLA options for each TPU chip.
"""
