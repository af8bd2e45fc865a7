//! The orientation of a stored weight.

/// Which way a product lies on the stored weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orientation {
    /// The weight is stored (out, in): W += B · A.
    OutIn,
    /// The weight is stored (in, out): W += Aᵀ · Bᵀ.
    InOut,
}
