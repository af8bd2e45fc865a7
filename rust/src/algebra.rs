//! Adapter algebra: adapters made from adapters, in factored form, without the model.
//!
//! An adapter of any format comes in and one of any format goes out. Modules of several adapters are
//! brought together by `sums`, updates are decomposed by `factored`, ranks are chosen by `ranks`; what is
//! made lies in `results` until `write` hands it to the conversion, and each module has its error.

mod bake;
mod combine;
mod engine;
mod factored;
mod options;
mod ranks;
mod report;
mod results;
mod rounding;
mod sums;
mod weights;
mod write;

pub use bake::{BakeOptions, bake};
pub use combine::{CombineOptions, ResizeOptions, combine, resize};
pub use options::{MethodOptions, Writing};
pub use report::{BudgetReport, Record, Report};
pub use weights::Weight;
