"""Training. Read pretrain.py or finetune.py from top to bottom: each is one visible loop, composed of the other files.

The parts (schedule, step, metrics, parallel, …) do not know each other. run.py opens, logs and closes a run; batches.py
feeds it; recovery.py is what happens when a loss is not finite.
"""
