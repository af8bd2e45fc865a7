//! Object stores behind the core's storage traits: checkpoints and adapters that are read by ranges, and models
//! that are uploaded in parts.
//!
//! The core is synchronous and knows nothing of this crate. Everything asynchronous runs on a runtime
//! of two threads of this crate's own (`runtime`); threads of the core only wait for it.

mod address;
mod budget;
mod buffers;
mod connection;
mod credentials;
mod destination;
mod failure;
mod options;
mod read_ahead;
mod runtime;
mod signed;
mod sink;
mod source;
mod spool;
mod staged;
mod store;

pub use address::{Address, is_url};
pub use budget::{Budget, DEFAULT_BYTES};
pub use connection::Connection;
pub use credentials::{Credentials, Provider};
pub use destination::{Cleaned, ObjectDestination, clean, put};
pub use store::{ObjectStoreFiles, Use};
