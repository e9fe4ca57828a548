"""HTTP for applications: the APIs that people already speak, and the playground, over the same turns as gRPC's."""
