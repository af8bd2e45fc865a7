//! The kinds of delta, one file each.

mod block_diagonal;
mod difference;
mod experts;
mod grouped;
mod hadamard;
mod kronecker;
mod low_rank;
mod reordered;
mod transforms;
mod tucker;

pub use block_diagonal::BlockDiagonal;
pub use difference::Difference;
use difference::{dense, dense_factors};
pub use experts::{Experts, SharedReads};
pub use grouped::Grouped;
pub use hadamard::{Hadamard, HadamardSide};
pub use kronecker::{Kronecker, KroneckerSide};
pub use low_rank::LowRank;
pub use reordered::{Order, Reordered, transposed};
pub use transforms::{Generalized, Orthogonal, RescaledInputs, Scaled};
pub use tucker::Tucker;
