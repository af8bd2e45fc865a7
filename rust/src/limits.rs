//! How much of anything an adapter or a command can ask for. Each is far beyond what there is, and
//! keeps a few bytes of a config from asking for more work or memory than any machine has.

/// The largest rank of a module: beyond any width that a model has.
pub const RANK: u64 = 1 << 20;
/// The most elements of the factors that a composed product expands to: more than those of any weight.
pub const EXPANDED: u64 = 1 << 31;
/// The most layers that `layer_replication` may make, and the most ranges it may have.
pub const LAYERS: u64 = 16_384;
/// The most tensors that a checkpoint may have once its layers are repeated.
pub const REPEATED_TENSORS: u64 = 4_000_000;
/// The most blocks of a block-diagonal factor (`nblocks` of `use_bdlora`).
pub const BLOCKS: u64 = 1 << 16;
/// The most parts of a fused weight (`enable_lora`).
pub const PARTS: usize = 1 << 10;
/// The most experts of one parameter.
pub const EXPERTS: u64 = 1 << 16;
/// The most updates of a plan that are of one expert each.
pub const UPDATES_OF_EXPERTS: u64 = 4_000_000;
/// The highest number of a token (`trainable_token_indices`).
pub const TOKEN: u64 = u32::MAX as u64;
/// The most names in a list that every module is held against by what its path contains.
pub const SUBSTRINGS: usize = 256;
/// The most parameters of one module that `target_parameters` may name.
pub const PARAMETERS_OF_MODULE: usize = 64;
/// The most ways of giving modules their parameters that are tried.
pub const ASSIGNMENTS: usize = 100_000;
/// The most leading parts of a name that can be what a base and an adapter differ by.
pub const LEADING_PARTS: usize = 64;
/// The most model types of a config and of those within it.
pub const MODEL_TYPES: usize = 64;
/// The most terms of the series of a rotation (`num_cayley_neumann_terms`).
pub const SERIES: u64 = 1_000;
/// The most worker threads.
pub const THREADS: usize = 1_024;
