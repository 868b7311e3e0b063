"""The data plane between the target and the draft worker: messages, rings, and the channel on either side."""
