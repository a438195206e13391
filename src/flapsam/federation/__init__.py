"""The federated algorithm: rounds, packets, aggregation, state on disk; and the engines that carry the packets."""
