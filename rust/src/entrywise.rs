//! Methods that look at each element of several updates: TIES, DARE, DELLA, breadcrumbs, magnitude
//! pruning and SCE.
//!
//! Everything is of one tensor, whose updates come as tiles of whole rows in f32. A [`Finder`] is shown all
//! tiles once for each pass that a method needs, in any order and by any number of threads, and becomes a
//! [`Selection`], which merges tile by tile. What it does to an element depends on the updates' values, the
//! seed and the element's place in the tensor alone, never on tiles or threads. The values have to be the
//! same bits in every pass.
//!
//! Sources: TIES, arXiv:2306.01708; DARE, arXiv:2311.03099; DELLA, arXiv:2406.11617; model breadcrumbs,
//! arXiv:2312.06795; SCE, arXiv:2408.07990. Where tools differ, `docs/strategies.md` has what is chosen here.

mod finder;
mod masks;
mod method;
mod order;
mod ranks;
mod selection;
#[cfg(test)]
mod tests;

pub use finder::{Counters, Finder};
pub use masks::Mask;
pub use method::{METHODS, Method, Options};
pub use order::Cut;
pub use selection::{Room, Selection};
