"""Checks of a run across sections; each yields one message per problem. Callers use
`pretrain.config.validate`."""
