//! Tensors: their element types, and the files that hold them: safetensors and GGUF.

pub mod dtype;
pub mod gguf;
pub mod orientation;
pub mod safetensors;
