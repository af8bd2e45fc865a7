//! The kinds of delta, one file each.

mod block_diagonal;
mod experts;
mod grouped;
mod low_rank;

pub use block_diagonal::BlockDiagonal;
pub use experts::{Experts, SharedReads};
pub use grouped::Grouped;
pub use low_rank::LowRank;
