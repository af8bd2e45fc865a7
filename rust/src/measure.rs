//! Measurements: of the entries and spectra of adapters, of their overlap, and of fleets.

pub mod analysis;
pub mod entries;
pub mod fleet;
pub mod metrics;
pub mod overlap;
pub mod places;
pub(crate) mod precision;
pub(crate) mod products;
pub mod spectrum;
pub mod statistics;
pub mod summary;
