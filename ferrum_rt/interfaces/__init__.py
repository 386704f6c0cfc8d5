"""The contracts: data, enums and Protocols. Standard library and msgspec only."""
