//! The formats of adapters, one file or folder each.

pub mod gguf;
pub mod image;
pub mod kohya;
pub mod mlx;
pub mod parts;
pub mod peft;
pub mod recognize;
pub mod tinker;
pub mod torchtune;
pub mod unread;
pub mod write_parts;

#[cfg(test)]
mod tests;
