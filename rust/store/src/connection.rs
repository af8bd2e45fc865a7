//! Connections: the client of one store, made when it is first needed and again after a fork.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use lorafast::{Error, Result};
use object_store::aws::{AmazonS3Builder, Checksum, resolve_bucket_region};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::multipart::MultipartStore;
use object_store::path::Path as ObjectPath;
use object_store::{ClientOptions, GetOptions, GetRange, HeaderMap, HeaderValue, ObjectStore};

use crate::address::{Address, Kind};
use crate::budget::Budget;
use crate::credentials::{self, Provider, Renewed};
use crate::failure::{Action, explain};
use crate::options::Options;
use crate::runtime::{self, Stop};
use crate::signed::Signed;

/// How one store is reached. Shows neither options nor credentials.
pub struct Connection {
    pub(crate) address: Address,
    options: Options,
    provider: Option<Provider>,
    clients: Mutex<Option<(u32, Clients)>>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) stop: Stop,
}

/// The two faces of a client.
#[derive(Clone)]
pub(crate) struct Clients {
    pub objects: Arc<dyn ObjectStore>,
    /// What uploads in parts; a web server has none.
    pub parts: Option<Arc<dyn MultipartStore>>,
}

impl Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Connection").field(&self.address).finish()
    }
}

impl Connection {
    /// Of the store at that URL. Nothing is asked of it yet.
    ///
    /// # Errors
    /// [`Error::Argument`] for what is no URL, and for unknown options.
    pub fn new(
        url: &str,
        options: &BTreeMap<String, String>,
        provider: Option<Provider>,
        budget: Arc<Budget>,
    ) -> Result<Arc<Self>> {
        let address = Address::parse(url)?;
        let mut options = Options::new(options, address.kind)?;
        if let (Kind::S3, Some((key, secret))) = (address.kind, &address.user) {
            options.insert("aws_access_key_id", key.as_str());
            options.insert("aws_secret_access_key", secret.as_str());
        }
        let (clients, stop) = (Mutex::default(), Stop::default());
        Ok(Arc::new(Self { address, options, provider, clients, budget, stop }))
    }

    /// Waits on behalf of a job from now on: what waits ends once its flag is raised.
    pub fn follow(&self, flag: &Arc<AtomicBool>) {
        self.stop.follow(flag);
    }

    /// Its address.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The client of this process.
    ///
    /// # Errors
    /// [`Error::Store`] if there are no credentials, or if it cannot be made.
    pub(crate) fn clients(&self) -> Result<Clients> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let own = std::process::id();
        if let Some((process, clients)) = &*clients
            && *process == own
        {
            return Ok(clients.clone());
        }
        // The default of this library's own copy of the crate; another caller of it has set the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let made = self.connect()?;
        // A client of the parent process has its sockets.
        std::mem::forget(clients.replace((own, made.clone())));
        Ok(made)
    }

    fn connect(&self) -> Result<Clients> {
        let (address, options) = (&self.address, &self.options);
        if self.provider.is_none() {
            credentials::check(address, options)?;
        }
        let (client, retries) = (options.client(address)?, options.retries()?);
        let failed =
            |error: object_store::Error| explain(address, &address.path, Action::Read, &error);
        macro_rules! configured {
            ($builder:expr) => {
                options.for_builder().fold($builder, |builder, (key, value)| match key.parse() {
                    Ok(key) => builder.with_config(key, value),
                    Err(_) => builder,
                })
            };
        }
        match address.kind {
            Kind::S3 => {
                let region = self.region(&client);
                let builder =
                    AmazonS3Builder::new().with_client_options(client).with_retry(retries);
                let mut builder = configured!(builder).with_bucket_name(&address.bucket);
                if let Some(region) = region {
                    builder = builder.with_region(region);
                }
                if !options.has("aws_checksum_algorithm") {
                    // What is signed is hashed anyhow.
                    builder = builder.with_checksum_algorithm(Checksum::SHA256);
                }
                if let Some(provider) = &self.provider {
                    let renewed = Renewed::new(provider.clone(), credentials::of_aws);
                    builder = builder.with_credentials(Arc::new(renewed));
                }
                let store = Arc::new(builder.build().map_err(failed)?);
                Ok(Clients { objects: store.clone(), parts: Some(store) })
            }
            Kind::Gcs => {
                let builder = GoogleCloudStorageBuilder::new()
                    .with_client_options(client)
                    .with_retry(retries);
                let mut builder = configured!(builder).with_bucket_name(&address.bucket);
                if let Some(provider) = &self.provider {
                    let renewed = Renewed::new(provider.clone(), credentials::of_gcp);
                    builder = builder.with_credentials(Arc::new(renewed));
                }
                let store = Arc::new(builder.build().map_err(failed)?);
                Ok(Clients { objects: store.clone(), parts: Some(store) })
            }
            Kind::Azure => {
                let builder =
                    MicrosoftAzureBuilder::new().with_client_options(client).with_retry(retries);
                let builder = configured!(builder);
                let mut builder = match address.bucket.contains('@') {
                    true => builder.with_url(format!("{}/", address.root)),
                    false => builder.with_container_name(&address.bucket),
                };
                if let Some(provider) = &self.provider {
                    let renewed = Renewed::new(provider.clone(), credentials::of_azure);
                    builder = builder.with_credentials(Arc::new(renewed));
                }
                let store = Arc::new(builder.build().map_err(failed)?);
                Ok(Clients { objects: store.clone(), parts: Some(store) })
            }
            Kind::Http => {
                let client = match &address.user {
                    Some((user, password)) => with_user(client, user, password)?,
                    None => client,
                };
                let mut builder =
                    HttpBuilder::new().with_client_options(client).with_retry(retries);
                if let Some(query) = &address.query {
                    builder = builder.with_http_connector(Signed::new(query));
                }
                let store = configured!(builder).with_url(&address.root).build().map_err(failed)?;
                Ok(Clients { objects: Arc::new(store), parts: None })
            }
        }
    }

    /// The region of a bucket at AWS that nobody gave: asked once, for a wrong one is refused.
    fn region(&self, client: &ClientOptions) -> Option<String> {
        let known = ["aws_region", "aws_default_region", "aws_endpoint", "aws_endpoint_url_s3"];
        if known.iter().any(|key| self.options.has(key)) {
            return None;
        }
        let asked = resolve_bucket_region(&self.address.bucket, client);
        runtime::wait(&self.stop, async { Ok(asked.await.ok()) }).ok().flatten()
    }

    /// A request that tells what an object is. A signature is often one for reading alone, with which
    /// nothing else may be asked.
    pub(crate) fn look_options(&self) -> GetOptions {
        match self.address.query {
            Some(_) => GetOptions::new().with_range(Some(GetRange::Bounded(0..1))),
            None => GetOptions::new().with_head(true),
        }
    }

    /// Whether an answer says that an object is not there: of a URL that is signed for one file, all others
    /// are refused.
    pub(crate) fn is_absent(&self, path: &ObjectPath, error: &object_store::Error) -> bool {
        use object_store::Error::{NotFound, PermissionDenied, Unauthenticated};
        match error {
            NotFound { .. } => true,
            PermissionDenied { .. } | Unauthenticated { .. } => {
                self.address.query.is_some() && *path != self.address.path
            }
            _ => false,
        }
    }

    /// What messages call an object.
    pub(crate) fn shown(&self, path: &ObjectPath) -> String {
        self.address.shown(path)
    }

    /// Waits for an answer about an object.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::Io`] if it is not there, [`Error::Cancelled`].
    pub(crate) fn ask<T>(
        &self,
        path: &ObjectPath,
        action: Action,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T> {
        runtime::wait(&self.stop, async {
            request.await.map_err(|error| explain(&self.address, path, action, &error))
        })
    }
}

/// A client that sends a user and a password with every request.
fn with_user(client: ClientOptions, user: &str, password: &str) -> Result<ClientOptions> {
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    let mut value = HeaderValue::from_str(&format!("Basic {text}"))
        .map_err(|_| Error::Argument("the user of the URL cannot be sent".to_owned()))?;
    value.set_sensitive(true);
    let mut headers = HeaderMap::new();
    headers.insert("authorization", value);
    Ok(client.with_default_headers(headers))
}
