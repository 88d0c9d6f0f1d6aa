"""What OpenVLA and OpenVLA-OFT share: towers, projector, Llama decoder, prompt, checkpoint folder."""
