//! Names of parameters: an adapter's and a base's, brought together.

pub mod canonical;
pub mod common;
pub mod diffusion;
pub mod endings;
pub mod orientation;
pub mod prefix;
pub mod renames;
pub mod towers;
pub mod wrappers;
