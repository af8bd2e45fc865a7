//! Factors of one module of many members, read for whoever multiplies them elsewhere.

use rayon::prelude::*;

use super::collection::{Collection, Piece};
use super::load::{Factors, Reader, Real};
use crate::error::Result;

/// The factors of the members that have a module, one after the other.
#[derive(Debug, Clone)]
pub struct Stacked<T> {
    /// Those members.
    pub members: Vec<usize>,
    /// The rank of each.
    pub ranks: Vec<usize>,
    /// The factor on each product.
    pub scales: Vec<f64>,
    /// B of each, (m, r) row-major.
    pub b: Vec<T>,
    /// A of each, (r, n) row-major.
    pub a: Vec<T>,
}

/// Reads in f32. The same errors as [`stacked_f64`].
///
/// # Errors
/// As there.
pub fn stacked_f32(
    collection: &Collection,
    module: usize,
    members: &[usize],
    pool: &rayon::ThreadPool,
) -> Result<Stacked<f32>> {
    stacked(collection, module, members, pool)
}

/// Reads in f64.
///
/// # Errors
/// [`crate::Error::Adapter`] for a file that was changed meanwhile, [`crate::Error::Io`].
///
/// # Panics
/// If there is no such member.
pub fn stacked_f64(
    collection: &Collection,
    module: usize,
    members: &[usize],
    pool: &rayon::ThreadPool,
) -> Result<Stacked<f64>> {
    stacked(collection, module, members, pool)
}

fn stacked<T: Real>(
    collection: &Collection,
    module: usize,
    members: &[usize],
    pool: &rayon::ThreadPool,
) -> Result<Stacked<T>> {
    let having: Vec<_> = members
        .iter()
        .filter_map(|member| Some((*member, collection.members[*member].piece(module)?)))
        .collect();
    let read = |(member, piece): &(usize, &Piece)| -> Result<Factors<T>> {
        Reader::new(&collection.members[*member])?.factors(piece)
    };
    let factors: Vec<_> =
        pool.install(|| having.par_iter().map(read).collect::<Result<Vec<_>>>())?;
    Ok(Stacked {
        members: having.iter().map(|(member, _)| *member).collect(),
        ranks: having.iter().map(|(_, piece)| piece.rank).collect(),
        scales: factors.iter().map(|factors| factors.scale).collect(),
        b: factors.iter().flat_map(|factors| &factors.b).copied().collect(),
        a: factors.iter().flat_map(|factors| &factors.a).copied().collect(),
    })
}
