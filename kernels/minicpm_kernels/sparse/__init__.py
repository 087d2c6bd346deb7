"""InfLLM-V2: choosing blocks, attending to them, and attention of a tree of drafts."""
