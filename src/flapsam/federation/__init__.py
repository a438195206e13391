"""The federated algorithm (rounds, packets, aggregation and state on disk) and the engines that carry its packets."""
