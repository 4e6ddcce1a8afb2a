"""What several tests share: real servers and clusters on this machine, small shards, child
processes."""
