"""Devices, processes and the compiler.

- mesh: the device mesh, and shardings of parameters and activations.
- runtime: joins the processes of a run; compilation cache.
- consensus: preemption, and checks that all processes run the same.
- watchdog: reports where a stalled run hangs.
- chips: peak FLOP/s, memory and link bandwidths of TPU chips.
- compiler: XLA options for each TPU chip.
"""
