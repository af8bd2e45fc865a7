//! The formats of adapters, one file or folder each.

pub mod kohya;
pub mod peft;

#[cfg(test)]
mod tests;
