//! The server's certificate and who signed it. Each renewal is a new certificate; a rotation is a new authority too.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// An authority, and what a server needs to serve under it.
#[derive(Clone, Debug)]
pub(crate) struct Authority {
    /// Its certificate, in PEM: what clients must trust.
    pub(crate) pem: String,
    pub(crate) config: Arc<ServerConfig>,
}

impl Authority {
    /// A new authority and a certificate for these addresses.
    pub(crate) fn new(addresses: &[IpAddr], http2: bool) -> Result<Self> {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        authority
            .distinguished_name
            .push(DnType::CommonName, "test-apiserver-ca");
        let key = KeyPair::generate().context("make the key of the authority")?;
        let certificate = authority
            .self_signed(&key)
            .context("sign the authority's certificate")?;
        let issuer = Issuer::new(authority, key);

        let mut names: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        names.extend(
            [
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "localhost",
            ]
            .map(str::to_owned),
        );
        let mut server = CertificateParams::new(names).context("name the server")?;
        server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        let key = KeyPair::generate().context("make the key of the server")?;
        let signed = server
            .signed_by(&key, &issuer)
            .context("sign the server's certificate")?;

        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("choose TLS versions")?
            .with_no_client_auth()
            .with_single_cert(vec![signed.der().clone()], private)
            .context("use the server's certificate")?;
        config.alpn_protocols = if http2 {
            vec![b"h2".to_vec(), b"http/1.1".to_vec()]
        } else {
            vec![b"http/1.1".to_vec()]
        };
        Ok(Self {
            pem: certificate.pem(),
            config: Arc::new(config),
        })
    }
}
