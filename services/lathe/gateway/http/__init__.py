"""The OpenAI door: JSON over HTTP, translated to the same services that the gRPC door serves."""
