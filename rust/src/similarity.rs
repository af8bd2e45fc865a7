//! Similarity of many adapters: the inner products of all their updates, equivalent adapters (one
//! update in another parameterization), and mixtures or earlier states of others.
//!
//! Everything is of the low-rank updates ΔW = s·B·A. What an adapter does beside them (DoRA's
//! magnitudes, biases, saved modules) is no part of a product; [`Collection`] says of each adapter
//! what was left out, and [`relation`] holds it against the other's.
//!
//! Thousands of adapters are never open at once: [`Collection`] remembers where their factors lie,
//! and whoever needs them reads them again.

mod cache;
mod collection;
mod drift;
mod groups;
mod load;
mod products;
mod relation;
mod signature;
mod stacked;
mod tiles;

#[cfg(test)]
mod tests;
pub use collection::{Collection, Member, ModuleInfo};
pub use drift::{Drift, drift};
pub use groups::Group;
pub use products::{
    Options, PlannedBlock, Precision, Products, Times, block_products, blocks, products, work,
};
pub use relation::{Relation, combination_norm, relation, relations};
pub use signature::{LEADING, Signature, signature, signatures};
pub use stacked::{Stacked, stacked_f32, stacked_f64};
