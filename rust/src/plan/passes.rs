//! The passes of the planner: functions over a draft, each with what it reads and what it changes in
//! its types. [`super::planner`] calls them, in the order that counts.

pub(super) mod backbone;
mod checks;
pub(super) mod coverage;
pub(super) mod dora;
pub(super) mod heads;
pub(super) mod modules;
pub(super) mod names;
pub(super) mod quantized;
pub(super) mod replication;
pub(super) mod saved;
pub(super) mod side_files;
pub(super) mod slices;
pub(super) mod targets;
pub(super) mod ties;
pub(super) mod tokens;
pub(super) mod undo;
