"""Stand-ins that implement our Protocols without a model: small, deterministic and strict about how they are used."""
