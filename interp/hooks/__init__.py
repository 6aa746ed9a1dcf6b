"""Access to one running model: its heads and prompts, reading and editing its attention, and generation.

The sub-packages are `model` (heads, layers, masks, provenance), `prompts` (token ids with named spans), `read`
(captures), `edit` (steering and ablation), `transformerlens` (the bridge) and `doctor` (compatibility checks). `seam`
connects all of them to the attention calls of the model, and `generate` decodes replies.
"""
