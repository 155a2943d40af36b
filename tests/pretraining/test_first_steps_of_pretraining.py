"""Every gpu.yaml and cluster.yaml of pretraining, on tiny stand-ins for the hub's; not vLLM, flash attention and the launchers."""

from first_steps import first_steps_of

test_it_takes_its_first_steps = first_steps_of("pretraining")
