//! Adapter algebra: adapters made from adapters, in factored form, without the model.
//!
//! An adapter of any format comes in and one of any format goes out. Modules of several adapters are
//! brought together by `sums`, updates are decomposed by `factored`, ranks are chosen by `ranks`; what is
//! made lies in `results` until `write` hands it to the conversion, and each module has its error. What reads
//! the factors a few rows at a time is `streamed`.
//!
//! `combine` says what is asked for, `engine` goes through the modules, which `work` or `bake` compute, `methods` knows the methods by name and
//! family, and `made` is what one makes of a module: a sum (`coefficients`), a decomposition (`joint`), a matrix
//! (`dense`) or PEFT's factors (`raw`).

mod bake;
mod bases;
mod combine;
mod dense;
mod engine;
mod extract;
mod factored;
mod joint;
mod made;
mod merge;
mod methods;
mod on_base;
mod options;
mod ranks;
mod raw;
mod report;
mod results;
mod rounding;
mod stacks;
mod streamed;
mod sums;
mod whole;
mod work;
mod write;

pub use crate::methods::MethodOptions;
pub use crate::weights::Weight;
pub use bake::{BakeOptions, bake};
pub use combine::{CombineOptions, ResizeOptions, combine, resize};
pub use extract::{
    ExtractOptions, ExtractPlan, ExtractReport, Extraction, extract, extract_part, plan_extraction,
};
pub use options::Writing;
pub use report::{BudgetReport, Record, Report};
