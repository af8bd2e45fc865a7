//! The kinds of delta, one file each.

mod arranged;
mod block_diagonal;
mod difference;
mod experts;
mod grouped;
mod hadamard;
mod interleaved;
mod kronecker;
mod low_rank;
mod orthogonal;
mod reordered;
mod rows;
mod transforms;
mod tucker;

pub(crate) use arranged::transposed;
pub use arranged::{Arranged, Factor, RowOrder};
pub use block_diagonal::BlockDiagonal;
pub use difference::Difference;
use difference::{dense, dense_factors};
pub use experts::{Experts, SharedReads};
pub use grouped::Grouped;
pub use hadamard::{Hadamard, HadamardSide};
pub use interleaved::Interleaved;
pub use kronecker::{Kronecker, KroneckerSide};
pub use low_rank::LowRank;
pub use orthogonal::{Cayley, Orthogonal, RotatedInputs};
pub use reordered::{Order, Reordered};
pub use rows::Rows;
pub use transforms::{Generalized, RescaledInputs, Scaled};
pub use tucker::Tucker;
