//! Tensors: their element types, and the safetensors files that hold them.

pub mod dtype;
pub mod orientation;
pub mod safetensors;
